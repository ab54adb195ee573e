"""The fused ops in other people's trainers, one file each. Nothing here is imported by the engine itself."""
