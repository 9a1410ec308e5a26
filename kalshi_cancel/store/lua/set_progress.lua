-- set_progress: has other things known of entries that nobody has claimed yet.
--
-- (after gather.lua, wake_ups.lua, fenced.lua) asked: lane (to wake up) · progress (what is known: JSON, or empty) ·
--       due_in_ms · id (of the mass cancel that asks, or empty) · token (of its runner); rows: order_id · path
-- returns how many those were, or "fenced"; what was ever claimed is left as it is

if fenced(asked.id, asked.token) then return 'fenced' end

local changed = 0
for order_id, path in rows(2) do
  local entry = prefix .. ':pending:' .. order_id
  local known = fields(entry, 'request', 'claimed_by', 'lane', 'path') or {}
  if known[1] and not known[2] and known[3] and known[4] then
    gather('ZREM', prefix .. ':due:' .. known[3] .. ':' .. known[4], order_id)
    gather('SADD', prefix .. ':paths', path)
    gather('ZADD', prefix .. ':due:' .. known[3] .. ':' .. path, now_ms + asked.due_in_ms, order_id)
    gather('HSET', entry, 'progress', asked.progress, 'path', path)
    changed = changed + 1
  end
end
flush()
if changed > 0 then wake_up(asked.lane) end
return changed
