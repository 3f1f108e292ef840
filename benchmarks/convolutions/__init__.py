"""A backbone of convolutions: do CART's matrices of kernels hold up against averaging them?

`python -m benchmarks.convolutions` (`make bench-convolutions`). The rooms:

- `backbone`: EfficientNet-lite0, pretrained, from a wheel
- `finetune`: one copy a task of the vision suite's images
- `suite`: merges with kernels decomposed and averaged, and their accuracy
"""
