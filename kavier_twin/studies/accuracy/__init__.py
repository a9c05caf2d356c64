"""How true the simulation's seconds are: measured data sets replayed, and how far off each was."""
