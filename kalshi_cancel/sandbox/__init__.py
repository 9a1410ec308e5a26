"""A local exchange that answers as the real one does, keeps the truth, and goes wrong on demand.

    with SandboxServer(keys={"my-key": public_key_pem}) as server, Control(server.url) as control:
        control.place("order-1", filled="3.00")
        control.fault("drop_after", order_id="order-1", times=1)
        ...  # point any client at server.url
        control.order("order-1")["history"], control.calls("cancel")

or `python -m kalshi_cancel.sandbox --key-id my-key --public-key public.pem --sample`. Who does what:

server     sockets: connections, and replies that hang, drip or break off
wire       requests and replies as bytes
exchange   a call's way: record it, let a fault strike, authenticate, charge, serve
routes     the table of endpoints and costs; served by cancels, placing, reading, groups, account
visit      one call under way: its parameters, and the order or group that it leads to
market     orders, groups, fills, read lag, cancel-all's tail: pure state
forms      how orders are written; refusal: how errors are
auth       keys, signatures, the clock window; buckets: the token budget
faults     what can go wrong (the table is there); settings: what can be switched (likewise)
armed      which fault strikes a call; spoiling: what the client gets to see of it
calls      the record of calls; floor: all of this state, its lock and its clock
levers     the unsigned routes under /sandbox/; control: a typed client for them

Its answers have the fields of the exchange's OpenAPI document (bench/results/conformance.md).
Not modelled: matching (orders fill when the control says so), money and positions, expiry of orders, a
group's contracts limit, market data, the archive of fills. A client_order_id used twice is a 409.
"""
