"""Filter pruning of CIFAR-10 ResNets by k-means clustering: data, network, training, cost and figures."""

__version__ = "0.1.0"
