"""Modules with palettized weights that are trained; usable alone, without the training run around them.

    insert_clusters(model, recipe, method=ClusterMethod())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    attach(model, optimizer)
    for batch in batches:
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()

After a step, the next forward pass clusters the weights anew; `attach` lets it know that there was one. Without it
version counters of the parameters tell, which most optimizers move. Fused ones do not: then the modules compare the
parameters themselves, which is as right and takes longer.
"""
