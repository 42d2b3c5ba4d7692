"""The paper's 14 claims: the evidence, a function per claim that returns its statistics, and what is written about them."""
