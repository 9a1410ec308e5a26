-- report: replies `unresolved` to the waiters of overdue entries; the work goes on.
--
-- (after gather.lua, audit.lua, reply.lua) asked: record_prefix · life_s · has_audit_log;
--       rows: order_id · the record up to · and after its requested_by (see conclude)
-- returns how many were reported: not those that were settled, asked for again or reported meanwhile

local reported = {}
for order_id, head, tail in rows(3) do
  local entry = prefix .. ':pending:' .. order_id
  local e = fields(entry, 'reported', 'deadline_ms', 'requested_by', 'reply_to', 'left_out', 'waiters') or {}
  if e[1] ~= '1' and (tonumber(e[2] or '') or math.huge) <= now_ms then
    local further = store_and_reply(asked.record_prefix, asked.life_s, order_id, head, e[3], tail, e[4], e[5], e[6])
    gather('HSET', entry, 'reported', 1)
    if further then gather('HSET', entry, 'replied', further) end
    gather('ZREM', prefix .. ':deadline', order_id)
    reported[#reported + 1] = order_id
  end
end
flush()
if #reported > 0 and asked.has_audit_log then
  audit('unresolved', '{"at":' .. now_ms .. ',"orders":' .. cjson.encode(reported) .. '}')
end
return #reported
