-- lanes_to_wake: finds the lanes in which something can be claimed and nobody is coming to claim it.
--
-- (after gather.lua, audit.lua, wake_ups.lua) asked: patience_ms · has_audit_log;
--       rows: lane · key of its queue
-- returns { how many entries the audit log is missing without telling so, why;
--           then for each lane: 2 a listening sender was woken, 1 a wake-up is to be published (by this caller alone), 0 neither }
--
-- Somebody is coming when a message waits in the queue, or when a sender has claimed within the patience: it
-- goes on until nothing is due. What became due within the patience has its message on the way, unless it
-- was a vanished sender's. A caller that dies before it publishes the wake-up is replaced after the patience.

local patience_ms = asked.patience_ms
local paths = redis.call('SMEMBERS', prefix .. ':paths')

local function anything_due(lane)
  for _, path in ipairs(paths) do
    local first = redis.call('ZRANGE', prefix .. ':due:' .. lane .. ':' .. path, 0, 0, 'WITHSCORES')
    local due_for_ms = first[2] and now_ms - tonumber(first[2]) or -1
    if due_for_ms >= patience_ms then return true end
    if due_for_ms >= 0 then
      local held = fields(prefix .. ':pending:' .. first[1], 'token')
      if not held or (held[1] or '') ~= '' then return true end  -- its lease ran out
    end
  end
end

local wanted = {}
for lane, queue in rows(2) do
  local claimed_ms = tonumber(redis.call('HGET', prefix .. ':claimed_ms', lane) or 0) or 0
  local sent_key = prefix .. ':wake_up_sent:' .. lane
  if anything_due(lane) and length(queue) == 0 and now_ms - claimed_ms >= patience_ms
    and redis.call('EXISTS', sent_key) == 0 then
    write('SET', sent_key, now_ms, 'PX', patience_ms)
    wanted[lane] = true
  end
end
flush()

local unmarked, _, why = 0, 0, ''
if asked.has_audit_log then
  mark_gap()
  unmarked, _, why = missing()
end
local answer = { unmarked, why }
for lane in rows(2) do answer[#answer + 1] = wanted[lane] and 1 + wake_up(lane) or 0 end
return answer
