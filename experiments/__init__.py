"""One module per table or figure of the paper: what is run, which claim it tests, and the verdict."""
