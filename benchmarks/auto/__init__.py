"""Where the defaults of CART without hyperparameters come from, and how far they carry.

On validation splits of the vision and the text suite, `search` tries variants of the closed form,
`study` variants with a base model, and `adapters` merges models of low rank. On test splits,
`number` compares methods by the number of models, and `carry` takes the defaults to other numbers
of tasks and to gentler fine-tuning. `cost` measures time and memory.
"""
