-- refuse: stores the record of a request that never entered the cancel store.
--
-- (after gather.lua, audit.lua) ARGV  1 prefix · 2 prefix of the record keys · 3 record's life, seconds · 4 order_id ·
--       5 record (JSON) · 6 what goes into the audit log (the body's JSON without its first brace; empty: nothing)
-- returns 1 stored, 0 the order has an entry or a record already, which says more

local record_key = ARGV[2] .. ARGV[4]
local is_known = redis.call('EXISTS', ARGV[1] .. ':pending:' .. ARGV[4], record_key) > 0
if not is_known then
  write('SETEX', record_key, ARGV[3], ARGV[5])
  write('PUBLISH', record_key, ARGV[5])
  flush()
end
if ARGV[6] ~= '' then audit('refused', '{"at":' .. now_ms .. ',' .. ARGV[6]) end
return is_known and 0 or 1
