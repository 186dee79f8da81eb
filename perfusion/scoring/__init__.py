"""The frozen models that score pictures, and the scores that they give: no part of any pipeline."""
