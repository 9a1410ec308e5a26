-- audit: appends to the trail of everything that was asked for and done; put before the scripts that do so.
--
-- Expects `prefix`. P:audit is a stream of { kind, body (JSON), hash }; the hash is SHA-1 (all that Redis
-- offers) over the previous entry's hash, the kind and the body, so that an edit or a gap shows. P:audit:head
-- is the last hash. Written in the same step as what it tells, so that nothing happens unseen.

local function audit(kind, body)
  local head = redis.call('GET', prefix .. ':audit:head') or ''
  local hash = redis.sha1hex(head .. kind .. body)
  redis.call('XADD', prefix .. ':audit', '*', 'kind', kind, 'body', body, 'hash', hash)
  redis.call('SET', prefix .. ':audit:head', hash)
end
