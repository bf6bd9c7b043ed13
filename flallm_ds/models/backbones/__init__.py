"""Any image encoder of transformers, timm or torchvision behind one interface.

No code per model family. A rule decides once, when a backbone is built, what its features
are: the model's pooled output, if the model has one and weights for it; else its class
token, if it has one; else the mean over all positions of its last layer. timm's models
pool themselves.
"""
