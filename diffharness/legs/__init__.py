"""One file per question; each turns captures into a leg with findings."""
