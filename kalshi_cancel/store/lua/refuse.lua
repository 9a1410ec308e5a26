-- refuse: stores the record of a request that never entered the cancel store.
--
-- (after gather.lua, audit.lua) asked: record_prefix · life_s · order_id · record (JSON) ·
--       audit (what goes into the audit log: the body's JSON without its first brace; empty: nothing)
-- returns 1 stored, 0 the order has an entry or a record already, which says more

local record_key = asked.record_prefix .. asked.order_id
local is_known = redis.call('EXISTS', prefix .. ':pending:' .. asked.order_id, record_key) > 0
if not is_known then
  write('SETEX', record_key, asked.life_s, asked.record)
  write('PUBLISH', record_key, asked.record)
  flush()
end
if asked.audit ~= '' then audit('refused', '{"at":' .. now_ms .. ',' .. asked.audit) end
return is_known and 0 or 1
