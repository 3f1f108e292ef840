"""One recipe, every method: what `mergekit-cart compare` does behind its command line.

From a recipe to a table: `variants` (the recipe that each method would get), `merge` (mergekit's
own merge of it, checked), `judge` (an evaluator in a process of its own), `steps` (what is finished
stays finished), `report` (JSON, Markdown, HTML).
"""
