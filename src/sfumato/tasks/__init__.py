"""Tasks: a request made of pictures. One file each; every task is a function

    task(model, picture(s) ..., request, its own settings) -> Request

that fills in where a run begins, what it keeps and what the network is told besides;
`model.run(request)`, or `model.sample_many` with others, makes the pictures. What the given request
says (prompt, steps, sampler, guidance, seed ...) stays as it is.
"""
