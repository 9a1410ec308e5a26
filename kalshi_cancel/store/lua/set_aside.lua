-- set_aside: sets entries aside that cannot be read, and replies to their waiters.
--
-- (after gather.lua, aside.lua, audit.lua, reply.lua) asked: record_prefix · life_s · has_audit_log;
--       rows: order_id · the token of the claim (empty: it is in none) · the record up to · and after its requested_by (see conclude)
-- returns the order ids of those that were set aside; the others are claimed by another worker, which may understand them

local answer = {}
for order_id, token, head, tail in rows(4) do
  local entry = prefix .. ':pending:' .. order_id
  local e = fields(entry, 'token', 'requested_by', 'reply_to', 'left_out', 'waiters')
  if redis.call('EXISTS', entry) == 1 and (not e or (e[1] or '') == token) then
    e = e or {}
    local replied = store_and_reply(asked.record_prefix, asked.life_s, order_id, head, e[2] or '[]', tail, e[3], e[4], e[5])
    if replied and replied > 0 then write('ZREMRANGEBYRANK', prefix .. ':waiters:' .. order_id, 0, replied - 1) end
    set_aside(order_id, entry)
    answer[#answer + 1] = order_id
  end
end
flush()
if #answer > 0 and asked.has_audit_log then
  audit('set_aside', '{"at":' .. now_ms .. ',"orders":' .. cjson.encode(answer) .. '}')
end
return answer
