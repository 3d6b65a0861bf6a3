"""The reference implementation: transformers' SegFormer."""

import torch
import transformers

from model.segformer import VARIANTS


def reference(name: str, labels: int = 150) -> transformers.SegformerForSemanticSegmentation:
    """transformers' network of the given variant, with random weights and statistics that are not trivial."""
    depths, hidden_sizes, decoder_size = VARIANTS[name]
    config = transformers.SegformerConfig(
        depths=depths, hidden_sizes=hidden_sizes, decoder_hidden_size=decoder_size, num_labels=labels
    )
    torch.manual_seed(len(name) + labels)
    network = transformers.SegformerForSemanticSegmentation(config).eval()
    unsettle(network, network.decode_head.batch_norm)
    return network


@torch.no_grad()
def unsettle(network: torch.nn.Module, norm: torch.nn.BatchNorm2d) -> None:
    """Give a network weights, biases and statistics none of which is trivial."""
    for parameter in network.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
