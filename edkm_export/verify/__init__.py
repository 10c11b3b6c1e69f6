"""The verifier: does what ships compute what was trained?"""
