"""Mode "minimal": what autograd saved of a large layer is rebuilt and used a slice of the batch at a time.

The one idea: in convolutions, matrix products and poolings the samples of a batch don't see each other, and
neither do neurons. So where a backward asks for a large tensor it gets a stand-in, and the operator that
takes it runs on one slice after the other: what has to stand whole is the gradient that comes in and the
one that goes out. Files: ``rows`` runs recipes on a slice, ``cut`` decides what is cut and shows that
slices are the forward's bits, ``stand_in`` is what autograd gets, ``gradients`` are the operators, ``room``
says what may stand as a whole.

Source: this package's own; gradient accumulation does for a network what this does for an operator.
"""
