def proposal_head(*a, **k): raise NotImplementedError
