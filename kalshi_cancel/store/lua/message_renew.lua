-- message_renew: extends the leases of a worker's messages, and puts those of vanished workers back.
--
-- (after gather.lua) ARGV  1 prefix · 2 lease, ms · 3 how many to put back at most · then delivery tags of this worker
-- returns how many were put back

local taken, leases = prefix .. ':taken', prefix .. ':taken:until'
local own, put_back = {}, 0
for at = 4, #ARGV do
  own[ARGV[at]] = true
  if redis.call('ZSCORE', leases, ARGV[at]) then gather('ZADD', leases, now_ms + ARGV[2], ARGV[at]) end
end
local over = redis.call('ZRANGEBYSCORE', leases, '-inf', now_ms, 'LIMIT', 0, ARGV[3])
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
