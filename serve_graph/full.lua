-- How HAProxy refuses for a service that is full: see full.py. Takes the JSON of the refusal.

local refusal = ...
local turned_away = {}

-- The body is read first, to the end: a connection that is closed on unread bytes is reset, and
-- its sender may never see the answer.
core.register_service("segment_full", "http", function(request)
    repeat
        local part = request:receive(65536)
    until not part or part == ""
    local application = request.f:be_name()
    turned_away[application] = (turned_away[application] or 0) + 1
    request:set_status(503)
    request:add_header("content-type", "application/json")
    request:add_header("content-length", tostring(#refusal))
    request:add_header("retry-after", "1")
    request:add_header("x-request-id", request.headers["x-request-id"][0])
    request:start_response()
    request:send(refusal)
end)

-- How many of an application's requests were refused since it was last asked.
core.register_fetches("segment_turned_away", function(_, application)
    local count = turned_away[application] or 0
    turned_away[application] = nil
    return count
end)
