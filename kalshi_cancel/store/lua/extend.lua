-- extend: keeps claims for the sender that holds them.
--
-- (after gather.lua) asked: lease_ms; rows: order_id · token
-- returns for each entry: 1 the lease runs anew, 0 the claim is no longer this sender's

local answer = {}
for order_id, token in rows(2) do
  local held = fields(prefix .. ':pending:' .. order_id, 'token', 'lane', 'path') or {}
  if held[1] == token and held[2] and held[3] then
    gather('ZADD', prefix .. ':due:' .. held[2] .. ':' .. held[3], now_ms + asked.lease_ms, order_id)
    answer[#answer + 1] = 1
  else
    answer[#answer + 1] = 0
  end
end
flush()
return answer
