"""What the paper's method does to a model: new words in it, the gate of a prompt, and the edited projections.

A prompt passes four files on its way to an edited K and V: `words` (its tokenizer and text encoder), `layer` (the hook
before the denoiser, and the projections), `gate` (what the concepts are set to) and `equations`.
"""


class EditError(ValueError):
    """An edit that cannot be attached or set as asked, or that something else has taken out of the denoiser."""


class TokenError(ValueError):
    """A placeholder, superclass or prompt that the tokenizer cannot take as asked."""
