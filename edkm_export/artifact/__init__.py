"""What the verifier asks of an exported model, whatever its format, and the loop that lets one write text."""
