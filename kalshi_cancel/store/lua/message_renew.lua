-- message_renew: extends the leases of a worker's messages, and puts those of vanished workers back.
--
-- (after gather.lua) asked: lease_ms · at_most (to put back); rows: delivery tag (of this worker's messages)
-- returns how many were put back

local taken, leases = prefix .. ':taken', prefix .. ':taken:until'
local own, put_back = {}, 0
for tag in rows(1) do
  own[tag] = true
  if redis.call('ZSCORE', leases, tag) then gather('ZADD', leases, now_ms + asked.lease_ms, tag) end
end
local over = redis.call('ZRANGEBYSCORE', leases, '-inf', now_ms, 'LIMIT', 0, asked.at_most)
for at = #over, 1, -1 do  -- the oldest comes last: it is served first
  local tag = over[at]
  if not own[tag] then
    local list, message = string.match(redis.call('HGET', taken, tag) or '', '^([^\n]*)\n(.*)$')
    if list then
      gather('RPUSH', list, message)
      gather('HDEL', taken, tag)
      put_back = put_back + 1
    end
    write('ZREM', leases, tag)
  end
end
flush()
return put_back
