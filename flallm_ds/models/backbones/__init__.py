"""Image encoders of transformers, timm and torchvision behind one interface.

No model family has code of its own. When a backbone is built, one rule chooses its
features: the pooled output of the model, if the model has one and weights for it; else the
class token, if the model has one; else the mean over all positions of the last layer.
Models of timm pool their output themselves.
"""
