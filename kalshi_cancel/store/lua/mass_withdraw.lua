-- mass_withdraw: ends cancels of a mass cancel that nobody is at, as refused: asking for them is no use.
--
-- (after gather.lua, fenced.lua, reply.lua) asked: id · token · record_prefix · life_s;
--       rows: order_id · its progress when it was looked at · the record up to · and after its requested_by (see conclude)
-- returns { 1, how many those were }; empty: it is not this runner's any more
--
-- What is claimed is left alone, and what somebody else has asked for too, or has worked on meanwhile.

if fenced(asked.id, asked.token) then return {} end
local withdrawn = 0
for order_id, progress, head, tail in rows(4) do
  local entry = prefix .. ':pending:' .. order_id
  local e = fields(entry, 'request', 'token', 'sent', 'progress', 'requested_by', 'reply_to', 'lane', 'path') or {}
  local is_json, request = pcall(cjson.decode, e[1])
  local is_ours = is_json and type(request) == 'table' and request.request_id == asked.id and e[7] and e[8] and not e[6] and #texts(e[5] or '[]') < 2
  local is_free = (e[2] or '') == '' and e[3] ~= '1' and (e[4] or '') == progress
  if is_ours and is_free then
    store_and_reply(asked.record_prefix, asked.life_s, order_id, head, e[5] or '[]', tail, false)
    gather('ZREM', prefix .. ':due:' .. e[7] .. ':' .. e[8], order_id)
    gather('ZREM', prefix .. ':deadline', order_id)
    delete(entry)
    withdrawn = withdrawn + 1
  end
end
flush()
return { 1, withdrawn }
