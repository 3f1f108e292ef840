"""The tensors of T models in, one tensor out.

Modules, from the bottom: `tensors` (what is decomposed, and as which matrices), `inputs` (checks),
`least_interference` (`cart_auto`), `settings`, `cart` (the method), `state_dicts` (whole models),
`indexing` (CART-Indexing of one tensor).
"""
