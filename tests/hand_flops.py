"""The FLOPs of small GPT-NeoX models by hand."""


def matrices(model):
    """The number of weights that every token is multiplied with; the look-up of embeddings is no product."""
    return sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "embed_in" not in n)


def attention(model, rows, width):
    """Queries times keys and weights times values, of all positions: kernels without blocks compute masked ones too."""
    config = next(module.config for module in model.modules() if hasattr(module, "config"))
    return 4.0 * config.num_hidden_layers * rows * width**2 * config.hidden_size


def forward(model, rows, width):
    return 2.0 * matrices(model) * rows * width + attention(model, rows, width)


def with_backward(model, rows, width, fused=True):
    """A backward is twice the forward; fused attention also computes its scores a second time."""
    return 3.0 * forward(model, rows, width) + 0.5 * fused * attention(model, rows, width)
