"""The robust gradient of one model (Nguyen et al., 2023, section 4.2.1).

Read it in the order of the paper: `ascent` is one step of Eq. 9, `particle` its S
steps, `gradient` the average over particles (Eq. 10), `transform` the same for Optax.
"""
