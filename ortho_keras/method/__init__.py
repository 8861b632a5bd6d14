"""The paper's method: orthonormality and modulation, for any Keras model. Imports no other package of ortho_keras."""
