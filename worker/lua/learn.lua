-- learn: has other things known of entries that no hand has had yet.
--
-- (after bells.lua, fenced.lua) ARGV  1 prefix · 2 the lane to ring for · 3 what is known (JSON, or empty) ·
--       4 until they are due, ms · 5 the mass cancel that asks (its id, or empty) · 6 its runner's fencing token ·
--       then two for each: order_id · path
-- returns how many those were, or "fenced"; what a hand has, or had, is left as it is

if fenced(ARGV[5], ARGV[6]) then return 'fenced' end

local changed = 0
for at = 7, #ARGV, 2 do
  local order_id, path = ARGV[at], ARGV[at + 1]
  local entry = prefix .. ':entry:' .. order_id
  local known = redis.call('HMGET', entry, 'request', 'hand', 'lane', 'path')
  if known[1] and not known[2] then
    redis.call('ZREM', prefix .. ':due:' .. known[3] .. ':' .. known[4], order_id)
    redis.call('SADD', prefix .. ':paths', path)
    redis.call('ZADD', prefix .. ':due:' .. known[3] .. ':' .. path, now_ms + ARGV[4], order_id)
    redis.call('HSET', entry, 'learned', ARGV[3], 'path', path)
    changed = changed + 1
  end
end
if changed > 0 then ring(ARGV[2]) end
return changed
