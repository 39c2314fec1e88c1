"""Use the fused losses in other trainers: TRL's GRPOTrainer (`trl`), transformers' Trainer (`hf`), verl (`verl`).

Callers import the module of their trainer; no other module of rmsd_fast imports these. Except for
`verl.install_fused_head`, they modify only instances that the caller passes in, never classes of another library. They
raise an error for every setting that they cannot reproduce exactly.
"""
