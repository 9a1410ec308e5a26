-- set_progress: has other things known of entries that nobody has claimed yet.
--
-- (after gather.lua, wake_ups.lua, fenced.lua) ARGV  1 prefix · 2 the lane to wake up · 3 what is known (JSON, or empty) ·
--       4 until they are due, ms · 5 the mass cancel that asks (its id, or empty) · 6 its runner's fencing token ·
--       then two for each: order_id · path
-- returns how many those were, or "fenced"; what was ever claimed is left as it is

if fenced(ARGV[5], ARGV[6]) then return 'fenced' end

local changed = 0
for at = 7, #ARGV, 2 do
  local order_id, path = ARGV[at], ARGV[at + 1]
  local entry = prefix .. ':pending:' .. order_id
  local known = fields(entry, 'request', 'claimed_by', 'lane', 'path') or {}
  if known[1] and not known[2] and known[3] and known[4] then
    gather('ZREM', prefix .. ':due:' .. known[3] .. ':' .. known[4], order_id)
    gather('SADD', prefix .. ':paths', path)
    gather('ZADD', prefix .. ':due:' .. known[3] .. ':' .. path, now_ms + ARGV[4], order_id)
    gather('HSET', entry, 'progress', ARGV[3], 'path', path)
    changed = changed + 1
  end
end
flush()
if changed > 0 then wake_up(ARGV[2]) end
return changed
