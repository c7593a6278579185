"""Values of the custom parameter `cast`, and of all of them, that are no request mode."""

BAD_MODES = ["", "fast", "OFF", " off", 0, 1, False, True, 1.5, [], ["off"], {}, {"off": 1}]
BAD_CUSTOM_PARAMS = ["off", "cast", 0, False, [], ["cast"], [["cast", "off"]]]
