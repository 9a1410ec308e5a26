-- extend: keeps claims for the sender that holds them.
--
-- (after gather.lua) asked: lease_ms · worker (its name); rows: order_id · token
-- returns for each entry: 1 the lease runs anew, 0 the claim is no longer this sender's

local answer = {}
for order_id, token in rows(2) do
  local entry = prefix .. ':pending:' .. order_id
  local held = fields(entry, 'token', 'lane', 'path', 'claimed_by') or {}
  if held[1] == token and held[2] and held[3] then
    gather('ZADD', prefix .. ':due:' .. held[2] .. ':' .. held[3], now_ms + asked.lease_ms, order_id)
    -- Who took a claim that came with a wake-up (grant.lua), nobody has known before.
    if held[4] ~= asked.worker then gather('HSET', entry, 'claimed_by', asked.worker) end
    answer[#answer + 1] = 1
  else
    answer[#answer + 1] = 0
  end
end
flush()
return answer
