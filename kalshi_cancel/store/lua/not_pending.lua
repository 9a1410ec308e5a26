-- not_pending: which of these orders are not pending.
--
-- rows: order_id
-- returns those ids

local found = {}
for order_id in rows(1) do
  if redis.call('EXISTS', prefix .. ':pending:' .. order_id) == 0 then found[#found + 1] = order_id end
end
return found
