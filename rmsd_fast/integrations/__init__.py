"""The fused losses inside other trainers: TRL's GRPOTrainer (`trl`), transformers' Trainer (`hf`), verl (`verl`).

A caller imports the module of the trainer in use; nothing else of rmsd_fast imports these modules. They reach into
instances that the caller hands over, never into another library's classes, and what they cannot carry over exactly they
refuse by name.
"""
