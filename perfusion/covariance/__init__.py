"""The second moment C = E[e eᵀ] of text encodings, from captions to its factor (docs/covariance.md).

C is uncentred, and by default covers every position that the cross-attention sees: beginning, words, end and padding.
Without the padding the similarity at padding positions is far from zero, and the edit damages every prompt.
"""
