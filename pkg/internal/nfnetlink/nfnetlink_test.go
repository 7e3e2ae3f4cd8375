package nfnetlink

import (
	"bytes"
	"encoding/binary"
	"testing"
)

// header makes an attribute's header.
func header(length, typ uint16) []byte {
	return binary.NativeEndian.AppendUint16(binary.NativeEndian.AppendUint16(nil, length), typ)
}

func TestNext(t *testing.T) {
	for name, c := range map[string]struct {
		in         []byte
		typ        uint16
		data, rest string
		ok         bool
	}{
		"empty":         {nil, 0, "", "", false},
		"short":         {[]byte{4, 0, 1}, 0, "", "", false},
		"too short":     {header(3, 1), 0, "", "", false},
		"too long":      {append(header(9, 1), "abcd"...), 0, "", "", false},
		"without data":  {header(4, 1), 1, "", "", true},
		"without pad":   {append(header(5, 1), 'a'), 1, "a", "", true},
		"padded":        {append(header(5, 1), "a\x00\x00\x00xyz"...), 1, "a", "xyz", true},
		"nested":        {append(header(8, 1|1<<15), "abcd"...), 1, "abcd", "", true},
		"in net order":  {append(header(8, 1|1<<14), "abcd"...), 1, "abcd", "", true},
		"longest value": {append(header(65535, 1), make([]byte, 65531)...), 1, string(make([]byte, 65531)), "", true},
	} {
		typ, data, rest, ok := Next(c.in)
		if typ != c.typ || string(data) != c.data || string(rest) != c.rest || ok != c.ok {
			t.Errorf("%s: type %d, data %q, rest %q, %v", name, typ, data, rest, ok)
		}
	}
}

func TestCollect(t *testing.T) {
	one, two := AppendString(nil, 1, "abcd"), AppendString(nil, 2, "")
	for name, c := range map[string]struct {
		in    []byte
		whole bool
	}{
		"all":     {append(bytes.Clone(one), two...), true},
		"nothing": {nil, true},
		"unknown": {append(bytes.Clone(one), AppendString(nil, 3, "x")...), false},
		"twice":   {append(bytes.Clone(one), one...), false},
		"cut":     {one[:len(one)-4], false},
	} {
		var a [3][]byte
		if whole := Collect(c.in, a[:]); whole != c.whole {
			t.Errorf("%s: whole is %v", name, whole)
		}
		if a[1] != nil && string(String(a[1])) != "abcd" {
			t.Errorf("%s: the first is %q", name, a[1])
		}
	}
	if _, ok := Uint32([]byte{1, 2, 3}); ok {
		t.Error("three bytes are a number")
	}
	if v, ok := Uint64([]byte{0, 0, 0, 0, 0, 0, 1, 2}); !ok || v != 258 {
		t.Errorf("the number is %d", v)
	}
}
