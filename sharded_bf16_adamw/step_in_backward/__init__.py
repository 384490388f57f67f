"""Update parameters inside the backward pass: a gradient is used and freed as soon as it is final.

================ ===================================================================
``step.py``      a step from its first final gradient to ``step()``
``batch.py``     gradients that are updated together
``clip.py``      gradient clipping
``zero.py``      the same under ZeRO stage 2
``checks.py``    incompatible options and misuse
``optimizer.py`` the methods of the optimizer
================ ===================================================================
"""
