"""One recipe merged whole: by mergekit's plan, or tensor by tensor where that would lose some.

- `inputs`: the recipe's models; `adapters`: those that are a base and an adapter, made whole
- `layout`: their tensors under the model's own names, whatever their files call them
- `routes`: the ways to merge the tensors, and which one a recipe takes
- `tensorwise`: the one of them that is not mergekit's
- `completion`: what belongs to a model beside its weights
- `verification`: what a finished folder has to hold
- `merge`: all of it; `request`: what a command asks for, checked before the work
- `child`: a process that ends with its parent
"""
