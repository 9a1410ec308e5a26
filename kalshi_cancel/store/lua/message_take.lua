-- message_take: takes the next message off its list, and notes in the same step that a worker has it.
--
-- (after gather.lua) KEYS the lists, the one that is served first first · asked: tag (delivery tag) · lease_ms
-- returns { list, message }, or nil: there is none
--
-- Whoever has tracking on (CLIENT TRACKING) and gets none is told when a list changes: so the lists are read,
-- and they are keys of the script, because older servers know only those.

for _, list in ipairs(KEYS) do
  local message = redis.call('LRANGE', list, -1, -1)[1]
  if message then
    write('ZADD', prefix .. ':taken:until', now_ms + asked.lease_ms, asked.tag)
    write('HSET', prefix .. ':taken', asked.tag, list .. '\n' .. message)
    write('LTRIM', list, 0, -2)
    flush()
    return { list, message }
  end
end
return nil
