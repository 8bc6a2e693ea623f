# Appends to LIBRARY what sealed.check of jaxkv wants to see there: the digest of its SOURCES, and its own.
file(SHA256 ${LIBRARY} DIGEST)
file(APPEND ${LIBRARY} "jaxkv-library-2:${SOURCES}${DIGEST}")
