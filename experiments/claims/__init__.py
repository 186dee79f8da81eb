"""The claims of the paper, one experiment each; `experiments.experiment` finds them."""
