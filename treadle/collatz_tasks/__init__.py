"""Learning tasks on Collatz trajectories, as plug-ins of the public contracts; importing the trainer loads none of this."""
