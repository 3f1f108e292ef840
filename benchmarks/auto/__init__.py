"""Where the defaults of CART without hyperparameters come from, and how far they carry.

`search` tries variants of the closed form on the validation splits of the vision and the text
suite, `study` variants with a base model; `number` compares methods by the number of models on test
splits; `adapters` merges models of low rank; `carry` takes the defaults to other numbers of tasks and to gentler fine-tuning; `cost`
measures time and memory.
"""
