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
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        network.decode_head.batch_norm.running_mean.normal_()
        network.decode_head.batch_norm.running_var.uniform_(0.5, 2)
    return network
