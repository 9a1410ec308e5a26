-- audit: appends to the audit log of everything that was asked for and done; put before the scripts that do so.
--
-- Expects `prefix`. P:audit is a stream of { kind, body (JSON), hash }; the hash is SHA-1 (all that Redis
-- offers) over the previous entry's hash, the kind and the body, so that an edit or a gap shows. P:audit:head
-- is the last hash. Written in the same step as what it tells, so that nothing happens unseen.
--
-- The audit log never decides about a cancel: where it cannot be written, the script goes on. P:counts counts what is
-- missing (audit_missed, with audit_why) and how many of them the audit log has noted (audit_marked): the next entry that
-- can be written is one of the kind "gap".

local function append(kind, body)  -- why it cannot be; nil: it is there
  local head_key = prefix .. ':audit:head'
  if not redis.acl_check_cmd('SET', head_key, '') then return 'NOPERM on ' .. head_key end
  local head = redis.pcall('GET', head_key)
  if type(head) == 'table' then return head.err end
  local hash = redis.sha1hex((head or '') .. kind .. body)
  local added = redis.pcall('XADD', prefix .. ':audit', '*', 'kind', kind, 'body', body, 'hash', hash)
  if type(added) == 'table' and added.err then return added.err end
  redis.call('SET', head_key, hash)
end

local function missing()  -- how many entries are missing that the audit log has not noted yet, of how many ever; and why
  local noted = redis.pcall('HMGET', prefix .. ':counts', 'audit_missed', 'audit_marked', 'audit_why')
  if noted.err then return 0, 0, noted.err end
  local missed = tonumber(noted[1]) or 0
  return missed - (tonumber(noted[2]) or 0), missed, noted[3] or ''
end

local function mark_gap()  -- why it cannot be; nil: there is none that is not marked
  local unmarked, missed, why = missing()
  if unmarked <= 0 or not redis.acl_check_cmd('HSET', prefix .. ':counts', '') then return nil end
  local body = '{"at":' .. now_ms .. ',"missed":' .. unmarked .. ',"why":' .. cjson.encode(why) .. '}'
  local cannot = append('gap', body)
  if not cannot then redis.pcall('HSET', prefix .. ':counts', 'audit_marked', missed) end
  return cannot
end

local function audit(kind, body)  -- whether it is there
  local cannot = mark_gap() or append(kind, body)
  if not cannot then return true end
  redis.pcall('HINCRBY', prefix .. ':counts', 'audit_missed', 1)
  redis.pcall('HSET', prefix .. ':counts', 'audit_why', string.sub(cannot, 1, 200))
  return false
end
