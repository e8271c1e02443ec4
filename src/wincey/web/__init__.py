"""`wincey web`: a page that shows the network, made of what the hosts' own APIs tell. It runs nowhere in the daemon.

gather asks the hosts, picture makes one document of their answers, server gives it and the page (assets/) to browsers.
"""
